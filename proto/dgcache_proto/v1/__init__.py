"""Version 1 of the contract. Generated; `make proto` writes it anew."""
