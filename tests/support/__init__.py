"""What tests share: how runs are started, small recipes, references slow and obvious. No test imports another test."""
