"""The shipped weights live here as package data."""
