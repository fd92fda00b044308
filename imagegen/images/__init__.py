"""The images: checked by their bytes, fetched while their links live, kept in one of several stores."""
