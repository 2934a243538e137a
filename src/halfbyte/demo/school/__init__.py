"""Where the embedded pair comes from: questions and pictures without end, lessons made of them, and the training itself."""
