"Networks, and what moves between them."
