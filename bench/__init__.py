"""What klpemu costs: each file measures one thing, `python -m bench` runs them all and prints ratios."""
