"""What a person looks at: tables, pictures, logs, and the run folders that they read."""
