"""What changes a layer before it is rounded, one method a file."""
