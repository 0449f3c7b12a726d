"""The attacks of docs/attacks.md, each under its number, done for real."""
