"""What `compare_methods.py` is made of: runs, what they cost, what is noise, tables, a figure."""
