-- Reserves more for a running task, together with the write of a checkpoint that records it.
--
-- KEYS    1 checkpoint; 2 the budgets that hold the task
-- ARGV    1 expected checkpoint, '' for none; 2 checkpoint to write; 3 its life in ms; 4 text of the amount (see
--         budget.lua); 5 life of budgets in s
-- result  kind, the other checkpoint or '', values of budgets (see budget.lua)
--         kind: '' (written, now or by an earlier try), 'other' (another checkpoint is there), 'budget' (over a budget)
local checkpoint = redis.pcall('GET', KEYS[1])
if type(checkpoint) ~= 'string' then checkpoint = '' end
if checkpoint == ARGV[2] then return {'', '', budget_reply} end
if checkpoint ~= ARGV[1] then return {'other', checkpoint, budget_reply} end
local budgets = keys_of_days(1)
reserve(budgets, ARGV[5], 1, function() return ARGV[4] end)
if not fits(1) then
  take_back(1)
  settle(redis.call, budgets, ARGV[5], {})
  return {'budget', '', budget_reply}
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return {'', '', budget_reply}
