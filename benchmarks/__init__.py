"""What measures dg-cached and shows it: a real S3 server, real archives, the demo."""
