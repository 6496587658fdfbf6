"""What the stages share: training adapters on pictures, drawing people with them, the `Personalizer`."""
