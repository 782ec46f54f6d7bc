"""Table in, plotly figure out. Files are named after what makes the table; nothing here writes a file."""
