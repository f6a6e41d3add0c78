"""An HTTP server in OpenAI's terms: one base, many adapters, one decoding engine."""
