"""What clients send and what they get: the OpenAI API with vLLM's extra fields."""
