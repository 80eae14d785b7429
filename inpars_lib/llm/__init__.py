"""Language models behind OpenAI-compatible servers: protocol, client, Batch API and output files."""
