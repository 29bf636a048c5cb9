"""What happens in one update, a file for each stage."""
