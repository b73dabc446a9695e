"""MediaPipe's hand networks as batched torch programs: loader, palms, landmarks, all of it together."""
