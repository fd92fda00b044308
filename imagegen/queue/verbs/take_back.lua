-- Takes back the call of a cancelled task that the provider has certainly not charged.
--
-- KEYS    1 record; 2 the budgets that hold it, if any
-- ARGV    1 epoch; 2 mark of the task's end; 3 the record with its lower cost; 4 text of what budgets get (see
--         budget.lua); 5 their life in s
-- result  1 if the record was written, 0 if it is that of another end, or was written before; values of budgets
local existing = redis.call('GET', KEYS[1])
if type(existing) ~= 'string' then return {0, budget_reply} end
local state, epoch = string.match(existing, '^%d+ (%l+) %S+ (%d+) ')
local marked = string.find(existing, ARGV[2], 1, true)
if state ~= 'cancelled' or epoch ~= ARGV[1] or not marked then return {0, budget_reply} end
-- Behind the mark, since the request before it may have such a field of its own.
if string.find(existing, '"upstream":true', marked, true) then return {0, budget_reply} end
redis.call('SET', KEYS[1], ARGV[3], 'KEEPTTL')
if ARGV[4] ~= '' then settle(redis.pcall, keys_of_days(1), ARGV[5], {ARGV[4]}) end
return {1, budget_reply}
