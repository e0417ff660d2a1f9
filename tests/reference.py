"""References in float64 numpy: plain loops, to be checked against the paper by eye."""

import numpy as np

# Objectives. `groups` gives each user's single group; omega is moved itself, not its logarithm.


def class_balanced_weights(item_counts, log=False):
    """Equation 2: w(i) = sum_j f(j) / f(i)."""
    weights = []
    for count in item_counts:
        weight = sum(item_counts) / count
        weights.append(np.log(weight) if log else weight)
    return np.array(weights)


def erm_loss(user_losses):
    """Equation 1."""
    total = 0.0
    for loss in user_losses:
        total += loss
    return total / len(user_losses)


def ipw_loss(user_losses, groups, group_sizes, log=False):
    """Equation 3: w(g) = sum_h f(h) / f(g)."""
    total = 0.0
    for loss, group in zip(user_losses, groups, strict=True):
        weight = sum(group_sizes) / group_sizes[group]
        total += (np.log(weight) if log else weight) * loss
    return total / len(user_losses)


def group_losses(user_losses, groups, num_groups):
    """L_g: the mean over the batch's users of the group; 0 for a group without any."""
    means = np.zeros(num_groups)
    for group in range(num_groups):
        mine = [x for x, g in zip(user_losses, groups, strict=True) if g == group]
        if mine:
            means[group] = sum(mine) / len(mine)
    return means


def gdro_step(omega, user_losses, groups, step_size):
    """Section 2.3.5: omega_g <- omega_g exp(eta L_g) / Z, then equation 5. Loss and new omega."""
    losses = group_losses(user_losses, groups, len(omega))
    moved = [w * np.exp(step_size * x) for w, x in zip(omega, losses, strict=True)]
    omega = np.array(moved) / sum(moved)
    return sum(w * x for w, x in zip(omega, losses, strict=True)), omega


def sdro_step(omega, estimate, user_losses, groups, step_size, stream_rate, hold):
    """Section 2.3.5: omega moved by the streaming estimate. Loss, new omega, new estimate."""
    losses = group_losses(user_losses, groups, len(omega))
    estimate = np.array(estimate)
    for group in range(len(omega)):
        if hold and group not in groups:
            continue
        estimate[group] = (1 - stream_rate) * estimate[group] + stream_rate * losses[group]
    moved = [w * np.exp(step_size * x) for w, x in zip(omega, estimate, strict=True)]
    omega = np.array(moved) / sum(moved)
    return sum(w * x for w, x in zip(omega, losses, strict=True)), omega, estimate


def cvar_loss(user_losses, alpha):
    """Equation 4: give the largest losses 1 / (alpha B) each until all of the weight is given."""
    cap = 1 / (alpha * len(user_losses))
    left, total = 1.0, 0.0
    for loss in sorted(user_losses, reverse=True):
        weight = min(cap, left)
        total += weight * loss
        left -= weight
    return total


def chi2_weights(user_losses, radius):
    """Levy et al. 2020: q_u = (l_u - eta)_+ / Z with the constraint met, eta by bisection.

    With eta far below the losses q is uniform; as eta rises to the largest loss, q moves onto it.
    """
    size = len(user_losses)
    losses = np.asarray(user_losses, np.float64) - max(user_losses)

    def weights(eta):
        positive = np.array([max(loss - eta, 0.0) for loss in losses])
        return positive / sum(positive)

    def divergence(q):
        return sum((size * x - 1) ** 2 for x in q) / (2 * size)

    ties = np.array([1.0 if loss == 0 else 0.0 for loss in losses])
    if divergence(ties / sum(ties)) <= radius:
        return ties / sum(ties)
    # -eta by its logarithm, for the spread may be far smaller than the losses.
    low, high = np.log(1e-12), np.log(1e12)
    for _ in range(200):
        middle = (low + high) / 2
        if divergence(weights(-np.exp(middle))) > radius:
            low = middle
        else:
            high = middle
    return weights(-np.exp(high))


def tilted_loss(user_losses, tilt):
    """Li et al. 2021, equation 2: 1/t log( 1/B sum_u exp(t l_u) )."""
    total = 0.0
    for loss in user_losses:
        total += np.exp(tilt * loss)
    return np.log(total / len(user_losses)) / tilt


def tilted_group_loss(user_losses, groups, num_groups, tilt):
    """Their equation 4 with tau = 0: 1/t log( 1/B sum_g n_g exp(t L_g) )."""
    total = 0.0
    for group, loss in enumerate(group_losses(user_losses, groups, num_groups)):
        size = sum(1 for g in groups if g == group)
        total += size * np.exp(tilt * loss)
    return np.log(total / len(user_losses)) / tilt


def cvar_smooth_step(threshold, user_losses, alpha, width, rate):
    """Loss and new threshold. The threshold is None before the first batch.

    eta <- (1 - beta) eta + beta Q, and eta + 1/(alpha B) sum_u h log(1 + exp((l_u - eta) / h)).
    """
    number = 1  # of the fewest users who have the share alpha
    while number < alpha * len(user_losses):
        number += 1
    quantile = sorted(user_losses, reverse=True)[number - 1]
    threshold = quantile if threshold is None else (1 - rate) * threshold + rate * quantile
    total = 0.0
    for loss in user_losses:
        total += width * np.logaddexp(0, (loss - threshold) / width)
    return threshold + total / (alpha * len(user_losses)), threshold


def spectral_loss(user_losses, spectrum, points=100):
    """Acerbi 2002: the integral over v from 0 to 1 of spectrum(v) times the v-quantile."""
    total = 0.0
    for rank, loss in enumerate(sorted(user_losses)):
        for point in range(points):
            v = (rank + (point + 0.5) / points) / len(user_losses)
            total += spectrum(v) * loss
    return total / (points * len(user_losses))


def gdro_adjusted_step(omega, user_losses, groups, step_size, sizes, adjustment):
    """Sagawa et al. 2020: Group DRO moved by L_g + C / sqrt(n_g). Loss and new omega."""
    losses = group_losses(user_losses, groups, len(omega))
    moved = [
        w * np.exp(step_size * (x + adjustment / np.sqrt(n)))
        for w, x, n in zip(omega, losses, sizes, strict=True)
    ]
    omega = np.array(moved) / sum(moved)
    return sum(w * x for w, x in zip(omega, losses, strict=True)), omega


def group_variance_loss(user_losses, groups, penalty):
    """ERM + lambda Var(L_g), over the groups of the batch: the penalty of Krueger et al. 2021,
    equation 8, whose first term is the sum of the L_g."""
    means = []
    for group in sorted(set(groups)):
        mine = [x for x, g in zip(user_losses, groups, strict=True) if g == group]
        means.append(sum(mine) / len(mine))
    middle = sum(means) / len(means)
    variance = sum((x - middle) ** 2 for x in means) / len(means)
    return erm_loss(user_losses) + penalty * variance


def _square(x):
    return sum(float(a) ** 2 for a in x)


def _nearest(x, centroids):
    """The place of the nearest centroid, among those that are not None."""
    found = [np.inf if c is None else _square(x - c) for c in centroids]
    return found.index(min(found))


def far_apart(vectors, number):
    """The vector farthest from the mean, then again and again the farthest from those chosen."""
    gaps = [_square(x - np.mean(vectors, axis=0)) for x in vectors]
    chosen = [vectors[gaps.index(max(gaps))]]
    while len(chosen) < number:
        gaps = [min(_square(x - c) for c in chosen) for x in vectors]
        chosen.append(vectors[gaps.index(max(gaps))])
    return chosen


def clusters_step(counts, sums, vectors, rate):
    """Mini-batch k-means, with a split of the largest cluster if the smallest has died out.

    Counts are all 0 before the first batch. Returns counts, sums, each user's cluster, and which
    cluster each one was before.
    """
    number, is_first = len(counts), sum(counts) == 0
    counts, sums, origin = list(counts), [np.array(x) for x in sums], list(range(number))
    if is_first:
        centroids = far_apart(vectors, number)
    else:
        centroids = [s / n if n > 0 else None for s, n in zip(sums, counts, strict=True)]
        small, large = counts.index(min(counts)), counts.index(max(counts))
        gaps = [x - centroids[large] for x in vectors if _nearest(x, centroids) == large]
        farthest = max(gaps, key=_square, default=np.zeros(1))
        if counts[small] < 0.1 * sum(counts) / number and _square(farthest) > 1e-9:
            origin[small] = large
            counts[small] = counts[large] = counts[large] / 2
            sums[large] = sums[large] / 2
            centroids[small] = centroids[large] + farthest / 2
            sums[small] = counts[small] * centroids[small]
    users = [_nearest(x, centroids) for x in vectors]
    keep, add = (0, 1) if is_first else (1 - rate, rate)
    for cluster in range(number):
        mine = [x for x, user in zip(vectors, users, strict=True) if user == cluster]
        counts[cluster] = keep * counts[cluster] + add * len(mine)
        sums[cluster] = keep * sums[cluster] + add * sum(mine, np.zeros(len(vectors[0])))
    return np.array(counts), np.array(sums), np.array(users), np.array(origin)


def cluster_dro_step(omega, user_losses, users, origin, step_size):
    """Group DRO over clusters. Loss, new omega, and the weight of each cluster of the batch."""
    omega = [omega[k] / list(origin).count(k) for k in origin]
    losses = group_losses(user_losses, users, len(omega))
    here = [k for k in range(len(omega)) if k in users]
    mean = sum(omega[k] * losses[k] for k in here) / sum(omega[k] for k in here)
    moved = [
        w * np.exp(step_size * (losses[k] if k in here else mean)) for k, w in enumerate(omega)
    ]
    omega = np.array(moved) / sum(moved)
    shares = np.array([w if k in here else 0 for k, w in enumerate(omega)])
    shares = shares / sum(shares)
    return sum(w * x for w, x in zip(shares, losses, strict=True)), omega, shares


# --- Loss and model ---


def cross_entropy(hidden, table, target):
    """-log softmax(table @ hidden)[target] of one target (paper, section 2.1)."""
    logits = np.array([float(np.dot(row, hidden)) for row in table])
    largest = max(logits)
    total = sum(np.exp(logit - largest) for logit in logits)
    return largest + np.log(total) - logits[target]


def cross_entropy_gradient(hidden, table, target):
    """Its gradient by hidden [D] and by table [V, D]: (p - onehot) W and (p - onehot) h^T."""
    logits = np.array([float(np.dot(row, hidden)) for row in table])
    shares = np.exp(logits - max(logits))
    shares = shares / sum(shares)
    shares[target] -= 1.0
    d_hidden = np.zeros_like(hidden)
    d_table = np.zeros_like(table)
    for item in range(len(table)):
        d_hidden = d_hidden + shares[item] * table[item]
        d_table[item] = shares[item] * hidden
    return d_hidden, d_table


def sampled_softmax(hidden, table, target, negatives):
    """Cross-entropy with a denominator of the target and V / k times each other negative."""
    weight = len(table) / len(negatives)
    total = np.exp(float(np.dot(table[target], hidden)))
    for item in negatives:
        if item != target:
            total += weight * np.exp(float(np.dot(table[item], hidden)))
    return np.log(total) - float(np.dot(table[target], hidden))


def gbce(hidden, table, target, negatives, t):
    """gSASRec's loss (Petrov and Macdonald 2023) times k + 1, with log(beta / k) in every score."""
    alpha = len(negatives) / len(table)
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    offset = np.log(beta / len(negatives))
    total = -np.log(_sigmoid(np.dot(table[target], hidden) + offset) ** beta)
    for item in negatives:
        if item != target:
            total -= np.log(1 - _sigmoid(np.dot(table[item], hidden) + offset))
    return total


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def window(items, max_len):
    """A user's training window: inputs (None for the begin token) and targets, newest last."""
    targets = list(items)[-(max_len - 1) :]
    return [None, *targets[:-1]], targets


def _layer_norm(x, parameters):
    normal = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    return normal * parameters["scale"] + parameters.get("bias", 0.0)


def _linear(x, parameters):
    return x @ parameters["kernel"] + parameters["bias"]


def _gate(x, parameters):
    return 1 / (1 + np.exp(-_linear(x, parameters)))


def _norm(x, parameters):
    """LayerNorm, or RMSNorm, which has no bias."""
    if "bias" in parameters:
        return _layer_norm(x, parameters)
    return x / np.sqrt(np.mean(x**2) + 1e-5) * parameters["scale"]


def position_bucket(distance):
    """Of T5: 16 exact ones, then 16 that grow up to a distance of 128."""
    if distance < 16:
        return distance
    growth = np.log2(distance / 16) / 3
    return min(int(16 + 16 * growth + 1e-9), 31)


def sasrec(parameters, inputs, *, num_blocks, num_heads):
    """Hidden states [n, D] of one user, alone and without dropout: pre-norm causal transformer."""
    length = len(inputs)
    x = []
    for place, item in enumerate(inputs):
        embedding = (
            parameters["begin_embedding"][0] if item is None else parameters["item_embedding"][item]
        )
        # Positions count from the newest token, which has 0.
        x.append(embedding + parameters["position_embedding"][length - 1 - place])
    for number in range(num_blocks):
        block = parameters[f"block_{number}"]
        dim = len(x[0])
        head_dim = dim // num_heads
        qkv = [_linear(_norm(row, block["attention_norm"]), block["attention_in"]) for row in x]
        mixed = []
        for place in range(length):
            heads = []
            for head in range(num_heads):
                cut = slice(head * head_dim, (head + 1) * head_dim)
                query = qkv[place][:dim][cut]
                logits = [
                    np.dot(query, qkv[key][dim : 2 * dim][cut]) / np.sqrt(head_dim)
                    for key in range(place + 1)
                ]
                if "position_bias" in block:
                    for key in range(place + 1):
                        bucket = position_bucket(place - key)
                        logits[key] += block["position_bias"][head][bucket]
                weights = np.exp(np.array(logits) - max(logits))
                weights = weights / weights.sum()
                heads.append(sum(w * qkv[key][2 * dim :][cut] for key, w in enumerate(weights)))
            mixed.append(np.concatenate(heads))
        gated = "ff_gate" in block
        for place in range(length):
            y = _linear(mixed[place], block["attention_out"])
            x[place] = x[place] + (y * _gate(x[place], block["attention_gate"]) if gated else y)
        for place in range(length):
            y = _linear(_norm(x[place], block["ff_norm"]), block["ff_in"])
            if gated:
                u, v = y[: len(y) // 2], y[len(y) // 2 :]
                y = u / (1 + np.exp(-u)) * v
            else:
                y = np.maximum(y, 0.0)
            y = _linear(y, block["ff_out"])
            x[place] = x[place] + (y * _gate(x[place], block["ff_gate"]) if gated else y)
    return np.array([_layer_norm(row, parameters["final_norm"]) for row in x])


def scores(parameters, hidden):
    """The score of each item after a hidden state: e_i . h + b_i."""
    found = parameters.get("output_embedding", parameters["item_embedding"]) @ hidden
    return found + parameters["item_bias"][:, 0] if "item_bias" in parameters else found


def nearby(sequences, num_items, weights):
    """M [V, V] times the weights by popularity."""
    counts = [sum(items.count(i) for items in sequences) for i in range(num_items)]
    found = np.zeros((num_items, num_items))
    for items in sequences:
        for later in range(len(items)):
            for earlier in range(max(0, later - weights.window), later):
                x, y = items[earlier], items[later]
                if x != y:
                    value = weights.distance_decay ** (later - earlier - 1)
                    found[x, y] += value
                    found[y, x] += weights.backward * value
    return found * (np.array(counts) + 1.0) ** -weights.item_power


def largest_of_rows(matrix, count):
    """A matrix with the `count` largest values of each row; the first of equal ones."""
    kept = np.zeros_like(matrix)
    for row, values in enumerate(matrix):
        best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
        kept[row, best] = values[best]
    return kept


def mixture(parameters, inputs, *, num_blocks, totals, shares):
    """Each item's probability after one user's inputs, [V], by the parts that the model has.

    Args:
        totals: t [V], or None without neighbours.
        shares: S [V, V].
    """
    own = parameters["mixture"]
    hidden = sasrec(parameters, inputs, num_blocks=num_blocks, num_heads=1)[-1]
    catalogue = _softmax(scores(parameters, hidden))
    history = [item for item in inputs[::-1] if item is not None][:65]
    newest = history[:64]

    count = len(newest)
    is_return = [float(item in newest[age + 1 :]) for age, item in enumerate(newest)]
    fading = [0.8**age for age in range(count)]
    features = [
        np.log(1 + count),
        sum(is_return) / max(count, 1),
        np.dot(is_return, fading) / max(sum(fading), 1),
        is_return[0] if count else 0.0,
        np.log(1 + len(set(newest))),
    ]
    features += [float(len(set(newest)) == few) for few in range(8)]
    if totals is not None:
        known = [(age, x) for age, x in enumerate(history[:12]) if totals[x] > 0]
        features.append(np.log(totals[newest[0]]) if count and totals[newest[0]] > 0 else 0.0)
    gates = np.array(features) @ own["gate"]["kernel"] + own["gate"]["bias"]

    parts = [catalogue]
    if "pointer_age" in own:
        returns = min(max(sum(catalogue[item] for item in set(newest)), 1e-6), 1 - 1e-4)
        gates = gates + own["gate_returns"] * np.log(returns / (1 - returns))
        catalogue[newest] = 0
        catalogue /= 1 - returns
        part, ages = np.zeros_like(catalogue), []
        for age, item in enumerate(newest):
            others = len(set(newest[:age]) - {item})
            score = own["pointer_age"][age] + own["pointer_newer"][others]
            if item not in newest[:age]:
                score += own["pointer_features"][0]
            if age + 1 < len(history) and history[age + 1] == newest[0]:
                score += own["pointer_features"][1]
            ages.append(score)
        for item, weight in zip(newest, _softmax(ages), strict=True):
            part[item] += weight
        parts.append(part)
        if not newest:
            gates[1] = -np.inf
    if totals is not None:
        part = np.zeros_like(catalogue)
        ages = [own["near_age"][a] + own["near_total"] * np.log(totals[x]) for a, x in known]
        for (_, item), weight in zip(known, _softmax(ages), strict=True):
            part += weight * shares[item]
        parts.append(part)
        if not known:
            gates[-1] = -np.inf
    return sum(gate * part for gate, part in zip(_softmax(gates), parts, strict=True))


def _softmax(logits):
    if len(logits) == 0:
        return np.zeros(0)
    values = np.exp(np.array(logits) - max(logits))
    return values / values.sum()


# --- Data and metrics ---


def repeated_rows(rows):
    """Which rows are equal to an earlier one."""
    before = set()
    found = []
    for row in rows:
        found.append(row in before)
        before.add(row)
    return found


def k_core(rows, k):
    """Rows (user, item) left when every user and item has k distinct partners; users first."""
    rows = list(rows)
    while True:
        size = len(rows)
        for side in (0, 1):
            partners = {}
            for row in rows:
                partners.setdefault(row[side], set()).add(row[1 - side])
            rows = [row for row in rows if len(partners[row[side]]) >= k]
        if len(rows) == size:
            return rows


def cut_by_rows(key, rows, cuts):
    """Group of each user: order by (key, place), add up rows, look where its last row falls."""
    total = sum(rows)
    groups = [0] * len(key)
    seen = 0
    for user in sorted(range(len(key)), key=lambda u: (key[u], u)):
        seen += rows[user]
        groups[user] = sum(1 for cut in cuts if not seen < cut * total)
    return groups


def rank_ties_last(scores, target, masked=()):
    """1-based rank of the target among the items that are not masked, last among its equals."""
    return sum(
        1 for item, score in enumerate(scores) if item not in masked and score >= scores[target]
    )


def ndcg(rank, k):
    """One relevant item: the ideal DCG is 1."""
    return 1 / np.log2(1 + rank) if 1 <= rank <= k else 0.0


def held_out(rows, parts, k, every):
    """A split by parts. Rows are (user, item, time), parts 0 (trains), 1 (validates), 2 (tests).

    Returns the vocabulary, the users, and by user: training items, whole known history before the
    test, all known items, and the validation and test targets as (item, known, repeat).
    """
    core = k_core([row[:2] for row, part in zip(rows, parts, strict=True) if part == 0], k)
    users, vocabulary = sorted({u for u, _ in core}), sorted({i for _, i in core})
    found = {}
    for user in users:
        mine = sorted(
            (part, row[2], place, row[1])
            for place, (row, part) in enumerate(zip(rows, parts, strict=True))
            if row[0] == user and (part > 0 or row[1] in vocabulary)
        )
        of = {part: [item for p, _, _, item in mine if p == part] for part in range(3)}
        targets = []
        for part, history in ((1, of[0]), (2, of[0] + of[1])):
            chosen = list(dict.fromkeys(of[part])) if every else of[part][:1]
            targets.append([(item, item in vocabulary, item in history) for item in chosen])
        known = {part: [item for item in of[part] if item in vocabulary] for part in range(3)}
        found[user] = (known[0], known[0] + known[1], [*known[0], *known[1], *known[2]], *targets)
    return vocabulary, users, found


def set_ranks(scores, targets, masked=()):
    """Order the items by score, a target behind its equals, equal targets in item order."""
    order = sorted(
        (item for item in range(len(scores)) if item not in masked),
        key=lambda item: (-scores[item], item in targets, item),
    )
    return [order.index(target) + 1 for target in targets]


def set_metrics(ranks, k):
    """Metrics of a user's targets by walking down the list of k items; rank 0 is a miss."""
    gain = precision = hits = first = 0.0
    for place in range(1, k + 1):
        if place in ranks:
            hits += 1
            gain += 1 / np.log2(1 + place)
            precision += hits / place
            first = first or 1 / place
    most = min(len(ranks), k)
    ideal = sum(1 / np.log2(1 + place) for place in range(1, most + 1))
    return {
        "NDCG": gain / ideal,
        "Recall": hits / len(ranks),
        "MRR": first,
        "MAP": precision / most,
        "HitRate": float(hits > 0),
    }


def list_ranks(rows, targets):
    """Ranks of one user's targets in the user's list; 0 for a target that is not in it.

    Rows are (item, order) in the order of the file, the lowest order first. Targets are last among
    items with an equal order, one after another.
    """
    best = {}
    for place, (item, order) in enumerate(rows):
        if item not in best or (order, place) < best[item]:
            best[item] = (order, place)
    shown = sorted(best, key=lambda item: (best[item][0], item in targets, best[item][1]))
    return sorted(shown.index(item) + 1 if item in shown else 0 for item in targets)


def list_stats(lists, k, item_counts, audience, num_users):
    """What lists of items show. An item of None is in no training row; no place may be empty."""
    exposure = [0] * len(item_counts)
    rows, percentiles, novelties = [], [], []
    for items in lists:
        for item in items[:k]:
            if item is None:
                rows.append(0)
                percentiles.append(0.0)
                continue
            exposure[item] += 1
            rows.append(item_counts[item])
            fewer = sum(1 for count in item_counts if count < item_counts[item])
            equal = sum(1 for count in item_counts if count == item_counts[item])
            percentiles.append((fewer + equal / 2) / len(item_counts))
            novelties.append(-np.log2(audience[item] / num_users))
    # Gini as the mean absolute difference of all pairs, over twice the mean.
    differences = sum(abs(a - b) for a in exposure for b in exposure)
    size = len(item_counts)

    def mean(values):
        return sum(values) / len(values) if values else None

    return {
        f"coverage@{k}": sum(1 for e in exposure if e) / size if rows else None,
        f"gini@{k}": differences / (2 * size * sum(exposure)) if sum(exposure) else None,
        f"mean_popularity@{k}": mean(rows),
        f"popularity_percentile@{k}": mean(percentiles),
        f"novelty@{k}": mean(novelties),
    }


def neighbour_scores(sequences, history, num_items, w, delta, beta, a, b, gamma, rho, phi):
    """Scores of all items by triple loops; `sequences` are the training rows of each user."""
    near = np.zeros((num_items, num_items))
    count = np.zeros(num_items)
    for sequence in sequences:
        for place, x in enumerate(sequence):
            count[x] += 1
            for distance in range(1, w + 1):
                if place + distance < len(sequence) and sequence[place + distance] != x:
                    y = sequence[place + distance]
                    near[x, y] += delta ** (distance - 1)
                    near[y, x] += beta * delta ** (distance - 1)
    scores = np.zeros(num_items)
    newest_first = history[::-1]
    for i in range(num_items):
        for age, x in enumerate(newest_first):
            if near[x, i] > 0:
                scores[i] += gamma**age * near[x, i] / (near[x].sum() ** a * (count[i] + 1) ** b)
    if scores.max() > 0:
        scores = scores / scores.max()
    for i in set(history):
        scores[i] += rho * phi ** newest_first.index(i)
    return scores


def ease_scores(sequences, histories, num_items, l2):
    """Scores [n, V] by the inverse of a dense matrix."""

    def binary(rows):
        found = np.zeros((len(rows), num_items))
        for row, items in enumerate(rows):
            found[row, list(items)] = 1
        return found

    has = binary(sequences)
    inverse = np.linalg.inv(has.T @ has + l2 * np.eye(num_items))
    weights = np.zeros((num_items, num_items))
    for i in range(num_items):
        for j in range(num_items):
            weights[i, j] = 0 if i == j else -inverse[i, j] / inverse[j, j]
    return binary(histories) @ weights
