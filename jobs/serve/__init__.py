"""`headrace serve`: a result, to be tried over OpenAI's chat API."""
