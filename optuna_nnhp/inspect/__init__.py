"""Read a finished or running study: result, replay, figures, HTML page, notes."""
