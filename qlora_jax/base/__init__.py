"""What knows nothing of JAX and everything else needs: errors for people, files, the boundary where foreign input is read, the console."""
