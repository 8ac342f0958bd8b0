"""What all three packages share. Nothing here needs torch."""
