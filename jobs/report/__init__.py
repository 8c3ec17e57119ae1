"""`headrace report`: a run as one page that a browser opens."""
