"""One file per subcommand. Each adds its arguments and calls one stage."""
