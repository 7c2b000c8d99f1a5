"""Results, figures and notes: they read a study and never change its course."""
