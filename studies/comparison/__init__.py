"""Parts of `compare_methods.py`: runs, costs, noise, tables, figure."""
