"""Tasks: questions whose answers can be marked right or wrong, asked through the chat template, compared item by item.

KL divergence says how far a candidate's next token is from its reference's; a task says whether anybody would notice. Both
models answer the same items, greedily, in the same batches, and every item is then one of four things: right in both, wrong in
both, lost, gained. Accuracies may agree while many answers flip both ways, so flips are what is reported.

task         the seam: items, how many tokens an answer may have, and a grade
lines        JSON files of strangers, read with caps and line numbers
opening      `NAME=FILE` -> tasks; what must be refused is refused here
gsm8k, ifeval, mbpp, questions, lastword    one reader and one grade each; lastword alone generates nothing
sandbox      where the code of an answer runs
asking       every model's answers, kept on disk under the digest of what they depend on
results      answers -> accuracies, flips, verdicts as record values; two bases -> the 2 x 2

Nothing here asks a judge model, and no grade looks at which model wrote the answer.
"""
