"""The small trained model that ships inside the package, and the tasks it was trained on."""
