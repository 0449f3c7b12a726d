"""The commands of `dg-cache`, a module for each group."""
