"""Images: where they come from, how they are split, prepared and dealt in batches."""
