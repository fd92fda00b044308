-- Cancels an unfinished task: removes its entry, so that no instance starts or finishes it. If it has other clients
-- (see joined.lua), the client that cancels leaves it, and nothing else is done but to publish that, in the same step.
--
-- The money of the task is computed from its checkpoint. If that has changed since, nothing is done.
--
-- An entry makes place for the next task of the client's line (see line_args.lua). A task in a line stays there, and is
-- dropped when its turn comes; until then its checkpoint shows that it is over.
--
-- KEYS    1 stream; 2 outbox; 3 record; 4 checkpoint; 5 delivery log; 6 clients; then the budgets that hold it,
--         if any
-- ARGV    1 group; 2 epoch; 3 final record; 4 its life in ms; 5 checkpoint of a cancelled task, without its entry id;
--         6 its life in ms, if the task is in no line; 7 due time in the outbox, Unix ms; 8 the task's name there;
--         9 '1' if it has webhooks; 10 the expected checkpoint, '' for none; 11 text of what budgets get (see
--         budget.lua); 12 their life in s; 13 client that cancels, '' for all of them; 14 the first clients of the
--         task; 15 channel for a client that leaves, '' if no other instance is there; 16 message
-- result  false if there is no record, else five values: '' if the task was cancelled, else the existing record, false
--         if the checkpoint is another one; the delivery log if webhooks were added, else '', or that checkpoint; the
--         count of calls that may have been paid twice if it was raised, else 0; values of budgets: see budget.lua; a
--         list of each line's client and what `move` returns; if the client left, two values: the number of
--         commands, with the call of this script, and whether the message was published, 1 or 0
local existing = redis.pcall('GET', KEYS[3])
if type(existing) ~= 'string' then return false end
local state, entry, epoch = string.match(existing, '^%d+ (%l+) (%S+) (%d+) ')
if (state ~= 'pending' and state ~= 'processing') or epoch ~= ARGV[2] then
  return {existing, '', 0, budget_reply, {}}
end
if ARGV[13] ~= '' then
  local names = joined_clients(KEYS[6], epoch, ARGV[14])
  local others, has_clients = names_after_cancel(names, ARGV[13])
  if has_clients then
    local has_left, is_published = others ~= names, ARGV[15] ~= ''
    if has_left then redis.call('SET', KEYS[6], epoch .. others, 'PX', line_life) end
    local published = is_published and redis.pcall('PUBLISH', ARGV[15], ARGV[16])
    return {3 + (has_left and 1 or 0) + (is_published and 1 or 0), type(published) == 'number' and 1 or 0}
  end
end
local checkpoint = redis.pcall('GET', KEYS[4])
if type(checkpoint) ~= 'string' then checkpoint = '' end
if checkpoint ~= ARGV[10] then return {false, checkpoint, 0, budget_reply, {}} end
local tombstone_life = ARGV[6]
if entry == IN_LINE then
  entry, tombstone_life = '0-0', math.max(tonumber(ARGV[6]), tonumber(line_life))
else
  if redis.call('XDEL', KEYS[1], entry) == 1 then left_stream(1) end
  redis.pcall('XACK', KEYS[1], ARGV[1], entry)
end
local count = billed_before(existing, epoch)
if count <= billed_in(ARGV[3]) then count = 0 end
redis.call('SET', KEYS[3], with_billed(ARGV[3], count), 'PX', ARGV[4])
redis.call('SET', KEYS[4], entry .. ' ' .. ARGV[5], 'PX', tombstone_life)
local log = string.match(existing, '^[^\n]* %+\n') and redis.pcall('GET', KEYS[5])
if type(log) ~= 'string' then log = '' end
if log ~= '' or ARGV[9] == '1' then redis.pcall('ZADD', KEYS[2], ARGV[7], ARGV[8]) end
if ARGV[11] ~= '' then settle(redis.pcall, keys_of_days(1), ARGV[12], {ARGV[11]}) end
return {'', log, count, budget_reply, move_next(KEYS[1])}
