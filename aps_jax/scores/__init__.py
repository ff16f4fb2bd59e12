"""How good a picture is: LPIPS, and the pictures and numbers of a report."""
