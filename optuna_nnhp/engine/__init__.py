"""The compiled CPU engine, which trains and evaluates networks faster than torch does."""
