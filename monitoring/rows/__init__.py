"""The dashboard's rows, from the question that is asked first to the one that is asked last."""
