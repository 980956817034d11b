"""Starting, supervising and stopping the processes of a server."""
