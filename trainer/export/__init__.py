"""What training made, in the forms that others read."""
