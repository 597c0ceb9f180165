"""Cadences that follow the gradients: their statistics, and the policies that read them."""
