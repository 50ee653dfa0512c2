"""One-step word problems, seven of each operation: add, subtract, multiply, divide."""

from __future__ import annotations

ARITHMETIC = (
    ("Tom has 12 apples and buys 4 more. How many apples does Tom have now?", 16),
    ("Anna had 7 cards and gave away 4. How many cards are left?", 3),
    ("A box holds 4 stickers. How many stickers are in 6 boxes?", 24),
    ("Lily shares 6 coins equally among 3 friends. How many coins does each friend get?", 2),
    ("Ben has 8 shells and buys 8 more. How many shells does Ben have now?", 16),
    ("Mia had 5 books and gave away 2. How many books are left?", 3),
    ("A box holds 3 pens. How many pens are in 4 boxes?", 12),
    ("Ines shares 30 apples equally among 5 friends. How many apples does each friend get?", 6),
    ("Tom has 9 cards and buys 8 more. How many cards does Tom have now?", 17),
    ("Anna had 8 stickers and gave away 3. How many stickers are left?", 5),
    ("A box holds 4 coins. How many coins are in 4 boxes?", 16),
    ("Lily shares 20 shells equally among 4 friends. How many shells does each friend get?", 5),
    ("Ben has 3 books and buys 9 more. How many books does Ben have now?", 12),
    ("Mia had 8 pens and gave away 5. How many pens are left?", 3),
    ("A box holds 3 apples. How many apples are in 6 boxes?", 18),
    ("Ines shares 6 cards equally among 3 friends. How many cards does each friend get?", 2),
    ("Tom has 5 stickers and buys 3 more. How many stickers does Tom have now?", 8),
    ("Anna had 7 coins and gave away 2. How many coins are left?", 5),
    ("A box holds 4 shells. How many shells are in 4 boxes?", 16),
    ("Lily shares 16 books equally among 4 friends. How many books does each friend get?", 4),
    ("Ben has 4 pens and buys 3 more. How many pens does Ben have now?", 7),
    ("Mia had 8 apples and gave away 2. How many apples are left?", 6),
    ("A box holds 3 cards. How many cards are in 3 boxes?", 9),
    ("Ines shares 6 stickers equally among 3 friends. How many stickers does each friend get?", 2),
    ("Tom has 2 coins and buys 6 more. How many coins does Tom have now?", 8),
    ("Anna had 8 shells and gave away 4. How many shells are left?", 4),
    ("A box holds 4 books. How many books are in 6 boxes?", 24),
    ("Lily shares 15 pens equally among 5 friends. How many pens does each friend get?", 3),
)
