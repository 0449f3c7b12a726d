"""The contract between dg-cached and its clients, generated from the `.proto` files beside it."""
