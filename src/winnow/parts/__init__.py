"""What methods are made of: amounts, scores, choices, combinations."""
