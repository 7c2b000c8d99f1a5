"""Where studies are kept: written behind, in batches, through kills and outages."""
