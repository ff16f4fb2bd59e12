"""Studies of what samples are: exact or not, spread as widely as they err or not."""
