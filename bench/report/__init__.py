"""Tables, plots and goals made of measured rows."""
