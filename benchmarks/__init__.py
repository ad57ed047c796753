"""What the README's figures come from: one command each, results committed as JSON with the machine's description."""
