"""What a kernel shows. Reaches the engine only through a `Transport`: HTTP, or one it is handed."""
