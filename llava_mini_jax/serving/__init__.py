"""A server for OpenAI's protocol in front of one engine; see docs/serving.md."""
