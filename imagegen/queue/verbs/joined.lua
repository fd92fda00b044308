-- Functions for the clients of a task; put before the scripts that use them.
--
-- The clients are one text: the epoch of the task, then each client's name behind a space. A list of another epoch counts
-- for nothing. Until a second client joins there is none, and the client that submitted the task is the only one.

local UNCOUNTED = ' *' -- instead of the clients beyond the most that are counted; it never leaves

-- Returns the names of a task's clients, each behind a space.
local function joined_clients(key, epoch, submitter)
  local list = redis.pcall('GET', key)
  local their_epoch, names = string.match(type(list) == 'string' and list or '', '^(%d+)(.*)$')
  if their_epoch == epoch then return names end
  return submitter == '' and '' or ' ' .. submitter
end

-- Returns where a name begins and ends in names, nil if it is none of them.
local function find_client(names, client)
  local first = string.find(names .. ' ', ' ' .. client .. ' ', 1, true)
  if first then return first, first + #client end
end
