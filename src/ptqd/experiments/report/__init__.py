"""One self-contained HTML page, its plots and grids, and the table for the terminal."""
