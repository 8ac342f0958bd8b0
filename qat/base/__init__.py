"""What all three packages share; needs no torch."""
