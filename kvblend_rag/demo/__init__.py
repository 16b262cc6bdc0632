"""The bundled reader, its documents and its questions."""
