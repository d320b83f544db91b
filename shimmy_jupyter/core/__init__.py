"""Pure decisions: no asyncio, threads, tornado, llama_cpp, files or clock."""
