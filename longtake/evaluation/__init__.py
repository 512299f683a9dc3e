"""Videos of held-out toy worlds in every way there is, scored and put into one table."""
